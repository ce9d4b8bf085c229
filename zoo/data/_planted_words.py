"""The words that planted notes are written with, in English and Chinese: eight topics, five styles, and words that mean neither."""

TOPICS = {
    "english": {
        "baking": "bread oven flour dough cake butter sugar crust yeast cookie",
        "camping": "tent campfire forest trail backpack lantern hiking lake stars mountain",
        "skincare": "serum cream mask toner sunscreen lotion cleanser glow pores moisture",
        "cats": "kitten whiskers paws purr litter fur scratching nap catnip collar",
        "cycling": "bike pedal wheel helmet saddle chain gears ride tyre climb",
        "painting": "canvas brush easel watercolour palette sketch pigment portrait gallery ink",
        "gardening": "seeds soil roses pruning compost greenhouse tulip watering herbs balcony",
        "coffee": "espresso beans latte grinder roast barista filter foam mug aroma",
    },
    "chinese": {
        "烘焙": "面包 烤箱 面粉 面团 蛋糕 黄油 砂糖 酥皮 酵母 饼干",
        "露营": "帐篷 篝火 森林 步道 背包 营灯 徒步 湖边 星空 高山",
        "护肤": "精华 面霜 面膜 爽肤水 防晒 乳液 洁面 透亮 毛孔 补水",
        "猫咪": "小猫 胡须 爪子 呼噜 猫砂 毛球 猫抓板 午睡 猫薄荷 项圈",
        "骑行": "单车 踏板 车轮 头盔 坐垫 链条 变速 骑车 轮胎 爬坡",
        "绘画": "画布 画笔 画架 水彩 调色盘 素描 颜料 肖像 画廊 墨水",
        "园艺": "种子 泥土 玫瑰 修剪 堆肥 温室 郁金香 浇水 香草 阳台",
        "咖啡": "浓缩 咖啡豆 拿铁 磨豆机 烘豆 咖啡师 滤纸 奶泡 马克杯 香气",
    },
}
STYLES = {
    "english": {
        "vintage": "retro antique classic nostalgic worn",
        "minimal": "simple clean plain bare quiet",
        "festive": "party sparkling holiday ribbon cheerful",
        "natural": "organic wooden earthy raw green",
        "dreamy": "pastel soft misty gentle floating",
    },
    "chinese": {
        "复古": "怀旧 古董 经典 老式 旧物",
        "极简": "简单 干净 素净 留白 安静",
        "节日": "派对 闪亮 假期 丝带 欢乐",
        "自然": "有机 木质 大地 原生 绿色",
        "梦幻": "粉彩 柔软 薄雾 温柔 漂浮",
    },
}
COMMON = {
    "english": "today share really love friends weekend little best always try new favourite idea easy home time made finally",
    "chinese": "今天 分享 真的 喜欢 朋友 周末 小小 最好 一直 尝试 新的 最爱 想法 简单 在家 时间 做了 终于",
}
SHORT = {"english": ["look", "my day", "so nice", "today", "wow"], "chinese": ["看看", "日常", "好看", "今天", "哇"]}
